// See one_definition_a.cpp.
#include "all_headers.hpp"
