"""What the benchmarks share: taking turns, statistics, the peers, tables and JSON.

Machines differ, and are shared: a time says nothing on its own. So contenders run in turn in one
process (A B A B ...), what is compared are medians, and each result says how far its values lie
apart, what the peer's version was, and how busy the machine.
"""
