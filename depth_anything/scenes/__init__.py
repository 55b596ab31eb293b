"""Procedural scenes with exact depth: layout, ray casting, materials."""
