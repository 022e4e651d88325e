"""How the advisor reads evidence, applies rules to it, and says what follows."""
