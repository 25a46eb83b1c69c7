// The main program of the tests: every rank runs all of them, in step.

#define CATCH_CONFIG_RUNNER
#include "catch.hpp"
#include "moe/mpi/environment.hpp"

int main(int argc, char** argv) {
  const moe::mpi::Environment environment(&argc, &argv);
  const int result = Catch::Session().run(argc, argv);
  // A rank that failed may have left the others in a call.
  if (result != 0) MPI_Abort(MPI_COMM_WORLD, 1);
  return result;
}
