"""The stages as Lightning modules, and what runs them."""
