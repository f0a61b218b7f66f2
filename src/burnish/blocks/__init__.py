"""The mathematics, by the five things a step touches; usable with no recipe at all.

weight: what stands for a matrix, and what is added to it.  state: what is added to hidden states.
tape: what backward keeps.  update: how a gradient becomes a step.  choose: scores, budgets and
thresholds that decide where.
"""
