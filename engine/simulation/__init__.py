"""The engine's core under virtual time: same scheduler, same cache, no model, no threads, no waiting.

step_costs   how long a step and its copies take
profiles     those costs for machines and models, each constant with its source
"""
