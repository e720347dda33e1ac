"""A small world for the black-box tests: guests, a hub with the real proxy in it, and servers of the internet."""
