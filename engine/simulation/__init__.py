"""The engine's core under virtual time: same scheduler, same cache, no model, no threads, no waiting.

step_costs         how long a step and its copies take
profiles           those costs for machines and models, each constant with its source
timeline           what a device does when: steps one after the other, copies beside them or between
virtual_time       what happens next
simulated_engine   `EngineCore` under all that
timed              a device that takes time and says nothing
contents           a device whose replies show whether the cache was right
checked_server     conversations and their log on a tiny engine, checked at every step
random_operations  whatever clients, copies and crashes may do to it

Of many ranks, whose managers are those of `engine.dist`, with instances that are step costs and counted
blocks instead of cores:

network            links between ranks, each constant with its source
cluster            ranks that serve one list of requests, alone, as one, or with what others lend
cluster_*          its instances and steps, memory and loans, profiles and requests
"""
