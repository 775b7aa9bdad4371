"""Where features live in diffusers' models: running branches, fusing per site, attaching to a host."""
