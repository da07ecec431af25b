#include "tests/data/store/kills.h"

namespace tailor::testing_support {
namespace {

class ManyKills : public StoreTest {};

TEST_F(ManyKills, two_hundred_instants) {
  ModelMaker(many_units()).write(model());
  for (const FormatChoice& choice : {int4_of(), as(WeightKind::nf4), as(WeightKind::fp8), {}}) {
    const PackOptions asked = options(choice, choice);
    pack_store(model(), folder_ / "whole", asked);
    const KillReport report = pack_under_fire(model(), store(), folder_ / "whole", asked, 50, 23);
    EXPECT_EQ(report.kills, 50);
    EXPECT_GE(report.resumed, 10);
    std::printf("%d kills, %d of them met a journal with some units\n", report.kills,
                report.resumed);
    fs::remove_all(store());
    fs::remove_all(folder_ / "whole");
  }
}

}  // namespace
}  // namespace tailor::testing_support
