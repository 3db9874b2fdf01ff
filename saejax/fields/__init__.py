"""Types and checks of config fields, and the text in which they are typed."""
