"""What the routers of a trained adapter do: measured in a pass over data (`measure`), drawn and written (`write`)."""
