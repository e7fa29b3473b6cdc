"""The networks: small ones of our own, the published ones by name, and where their weights come from."""
