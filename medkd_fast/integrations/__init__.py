"""Distillation inside other people's trainers: one module each, imported only when asked for."""
