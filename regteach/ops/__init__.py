"""Operations that networks are made of: a plain form, and beside it one that is fast and small."""
