"""Run folders after the fact: tables, pages, lists, and the run as an object."""
