"""From files to token ids: sources, formats, checks, rendering, cutting, packing, and the store that trainers read."""
