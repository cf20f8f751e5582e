"""Rows in; statistics, tables, figures and pages out."""
