"""The demo: every stage of the product in one go, on real people, from nothing."""
