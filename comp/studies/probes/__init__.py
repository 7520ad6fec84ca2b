"""Frozen classification: does the encoder still classify after training?"""
