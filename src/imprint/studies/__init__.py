"""Studies: ready-made experiments around a paper, and the paper's own figures to set beside what is measured."""
