"""Studies of evidence, rules that apply to them, and the words of what follows."""
