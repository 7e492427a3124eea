"""The engine's core under virtual time: same scheduler, same cache, no model, no threads, no waiting.

step_costs         how long a step and its copies take
profiles           those costs for machines and models, each constant with its source
timeline           what a device does when: steps one after the other, copies beside them or between
virtual_time       what happens next
simulated_engine   `EngineCore` under all that
contents           a model whose replies show whether the cache was right
random_operations  whatever clients, copies and crashes may do to it, checked
"""
