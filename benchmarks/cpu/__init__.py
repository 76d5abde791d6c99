"""What benchmarks/cpu_peers.py is made of: engines in workers, their files, rounds of measurements, the report.

Workers run in the interpreter that has their engine: modules that they import need numpy and that engine alone.
"""
