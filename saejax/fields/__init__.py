"""Types and checks of config fields, and the syntax in which people type them."""
