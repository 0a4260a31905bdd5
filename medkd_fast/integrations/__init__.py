"""Losses in other people's trainers. Each module needs the package that it is named after; none is imported with `medkd_fast`."""
