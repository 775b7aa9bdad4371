"""The REST service: jobs in, pictures out."""
