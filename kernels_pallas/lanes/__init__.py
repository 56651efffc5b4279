"""Kernels written lane by lane, once, for two machines: a GPU through Mosaic, and NumPy (`Simulated`) for tests.

A lane is one thread. A body calls the methods of its `Machine` and combines the values that they return by Python's
operators; every value is that of one lane. Integers are 32 bits wide and not negative unless a body takes care,
addresses are 64 bits wide in device memory and 32 in shared memory, both in bytes.
"""
