"""What a training run optimises."""
