"""What happened, for people: pages that stand alone, tables in the terminal, and a diagnosis in words."""
