"""Where clients come from: one short file per source."""
