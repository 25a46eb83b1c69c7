// This file and one_definition_b.cpp include every header and are linked into one program: a
// function or variable that a header defines without `inline` is defined twice, and linking fails.
#include "all_headers.hpp"
