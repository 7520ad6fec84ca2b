"""The operators, one folder each: public function, definition, implementations, maths."""
