"""Long checks of the whole package: fault injection, mutation testing, conversion of every model of a zoo."""
