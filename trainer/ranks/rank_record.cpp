#include "trainer/ranks/rank_record.h"

#include <algorithm>

#include "base/json.h"

namespace tailor {

std::string RankRecord::doing() const {
  std::string out = phase;
  for (const std::string& call : calls) out += (&call == calls.data() ? ": " : ", ") + call;
  return out;
}

std::string RankRecord::dump() const {
  return Json{{"beats", beats},    {"life", static_cast<int>(life)},
              {"phase", phase},    {"calls", calls},
              {"code", exit_code}, {"cause", cause},
              {"words", words}}
      .dump(-1, ' ', false, Json::error_handler_t::replace);
}

RankRecord RankRecord::read(const std::string& text) {
  const std::string where = "the meeting point of the ranks";
  const Json json = parse_json(text, where);
  const JsonReader reader(json, where);
  RankRecord out;
  out.beats = reader.integer("beats");
  out.life = static_cast<Life>(std::clamp<std::int64_t>(reader.integer("life"), 0, 3));
  out.phase = reader.text("phase");
  for (const Json& call : reader.at("calls")) out.calls.push_back(call.get<std::string>());
  out.exit_code = static_cast<int>(reader.integer("code"));
  out.cause = static_cast<int>(reader.integer("cause"));
  out.words = reader.text("words");
  return out;
}

}  // namespace tailor
