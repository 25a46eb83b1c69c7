// See one_definition_a.cpp.
// <complex.h> defines the macro I, which users of FFTW and LAPACKE bring along.
#include <complex.h>

#include "all_headers.hpp"
