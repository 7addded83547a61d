"""The shapes everything else has: stages, and one stage at many sites.

Comes in: tensors under keys. Goes out: tensors under other keys.
Uses: no other room.
"""
