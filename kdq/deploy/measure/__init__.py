"""What an exported network costs, and whether it computes the same."""
