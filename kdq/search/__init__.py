"""Bits, layer by layer, under budgets: costs, sensitivities, and searchers that compete."""
