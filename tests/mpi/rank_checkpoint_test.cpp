#include "../../examples/expert_parallel/rank_checkpoint.hpp"

#include <filesystem>
#include <string>
#include <utility>

#include "errors.hpp"
#include "support.hpp"
#include "temporary_folder.hpp"

using namespace moe::test;
using Catch::Matchers::Contains;
using expert_parallel::RankCheckpoint;
using language_model::Checkpoint;
using language_model::Place;
using moe::Index;
using moe::mpi::Communicator;

namespace {

/// The files of a rank, whose only number says of which update and rank they are.
struct Files {
  explicit Files(const std::string& settings = "seed=1")
      : file(folder.file("training") + ".rank" + std::to_string(world.rank())),
        saved(file, settings),
        next(file + ".new", settings),
        all(folder.file("training"), settings, world) {}

  double number(Index update) const { return 10.0 * static_cast<double>(update) + world.rank(); }
  /// What one rank alone writes, as it has when it is killed.
  void write(const Checkpoint& checkpoint, Index update) const {
    const moe::Matrix<double> a = moe::Matrix<double>::Constant(1, 1, number(update));
    checkpoint.write({update, 2.5}, [&](moe::SafetensorsWriter& writer) { writer.add("a", a); });
  }
  void write_all(Index update) const {
    const moe::Matrix<double> a = moe::Matrix<double>::Constant(1, 1, number(update));
    all.write(world, {update, 2.5}, [&](moe::SafetensorsWriter& writer) { writer.add("a", a); });
  }
  /// Checks that what is read is that of the update, and that nothing is read of update 0.
  void check_read(Index update) const {
    int calls = 0;
    const Place place =
        all.read(world, [&](const moe::SafetensorsFile& from, const Place& reached) {
          ++calls;
          CHECK(reached.update == update);
          CHECK(from.matrix<double>("a")(0, 0) == number(update));
        });
    CHECK(calls == (update > 0 ? 1 : 0));
    CHECK(place.update == update);
    CHECK(place.seconds == (update > 0 ? 2.5 : 0));
  }
  std::string error_of_read() const {
    return error_of([&] { all.read(world, [](const moe::SafetensorsFile&, const Place&) {}); });
  }

  Communicator world{MPI_COMM_WORLD, 30};
  TemporaryFolder folder;
  std::string file;
  Checkpoint saved, next;
  RankCheckpoint all;
};

}  // namespace

TEST_CASE("rank checkpoint: what all ranks wrote is read, and nothing else is left", "[mpi]") {
  const Files files;
  files.check_read(0);
  files.write_all(3);
  files.check_read(3);
  files.write_all(4);
  CHECK_FALSE(files.next.exists());
  files.check_read(4);

  RankCheckpoint none("", "", files.world);
  none.write(files.world, {3, 2.5}, [](moe::SafetensorsWriter&) { FAIL(); });
  none.read(files.world, [](const moe::SafetensorsFile&, const Place&) { FAIL(); });
  CHECK_FALSE(none.exists());
}

TEST_CASE("rank checkpoint: killed while some ranks have replaced their files", "[mpi]") {
  const Files files;
  files.write_all(3);
  files.write(files.world.rank() == 0 ? files.saved : files.next, 5);
  files.check_read(5);
  // From now on they are alike.
  CHECK(files.saved.place().update == 5);
  CHECK_FALSE(files.next.exists());
}

TEST_CASE("rank checkpoint: killed while some ranks have written their files", "[mpi]") {
  const Files files;
  const bool is_alone = files.world.size() == 1;
  // In the first writing, and in a later one.
  if (files.world.rank() == 0) files.write(files.next, 2);
  CHECK(files.all.exists() == (files.world.rank() == 0));
  files.check_read(is_alone ? 2 : 0);
  files.write_all(5);
  if (files.world.rank() == 0) files.write(files.next, 7);
  files.check_read(is_alone ? 7 : 5);
  files.write_all(9);
  files.check_read(9);
  CHECK_FALSE(files.next.exists());
}

TEST_CASE("rank checkpoint: where one rank cannot write, all keep their files", "[mpi]") {
  const Files files;
  files.write_all(5);
  if (files.world.rank() == files.world.size() - 1) {
    std::filesystem::create_directory(files.file + ".new");
  }
  CHECK_THAT(error_of([&] { files.write_all(6); }), Contains(".new"));
  CHECK(files.saved.place().update == 5);
}

TEST_CASE("rank checkpoint: files without an update in common are refused", "[mpi]") {
  const Files files;
  if (files.world.size() == 1) return;
  const bool is_first = files.world.rank() == 0;
  if (is_first) files.write(files.saved, 4);
  CHECK_THAT(files.error_of_read(), Contains("training are not those of one update, but of 4, 0") &&
                                        Contains("delete all of them"));
  if (!is_first) files.write(files.saved, 6);
  CHECK_THAT(files.error_of_read(), Contains("of 4, 6"));
  CHECK(files.saved.place().update == (is_first ? 4 : 6));
}

TEST_CASE("rank checkpoint: files of other settings are refused by all ranks", "[mpi]") {
  const Files files;
  files.write_all(3);
  const bool is_last = files.world.rank() == files.world.size() - 1;
  const RankCheckpoint other(files.folder.file("training"), is_last ? "seed=2" : "seed=1",
                             files.world);
  CHECK_THAT(
      error_of([&] { other.read(files.world, [](const moe::SafetensorsFile&, const Place&) {}); }),
      Contains("is another training") && Contains("seed=2"));
}
