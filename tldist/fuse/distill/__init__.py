"""Distillation: several teachers, of any architectures and class sets, teach one student of any other."""
