"""Triton kernels, one file per operator; the references they are tested against are in `sparse_gen.ops`."""
