"""Selective scan (Mamba-1) over packed documents."""
