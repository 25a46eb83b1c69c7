#include "../progress.hpp"

/// The main program of every benchmark but one, which begins with MPI.
int main(int argc, char** argv) { return bench::run(argc, argv); }
