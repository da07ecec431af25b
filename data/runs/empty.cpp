namespace tailor {}
