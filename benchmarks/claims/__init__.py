"""Test the claims of Depth Anything V1 and V2 with tiny networks: `make claims` (docs/claims.md)."""
