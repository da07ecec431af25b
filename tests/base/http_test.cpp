#include <gmock/gmock.h>
#include <unistd.h>

#include "base/http/http_client.h"
#include "tests/support/http_server.h"

namespace tailor {
namespace {

using testing::HasSubstr;
using Kind = HttpAnswer::Kind;

TEST(Http, asks_posts_and_tells_apart_why_there_is_no_answer) {
  const HttpServer server([&](const HttpServer::Request& request) -> HttpServer::Answer {
    if (request.path == "/late") ::usleep(600'000);
    if (request.path == "/moved") return {302, ""};
    if (request.path == "/large") return {200, std::string(2'000, 'x')};
    return {request.path == "/none" ? 404 : 200, request.method + " " + request.body};
  });
  HttpClient::Options options;
  options.headers = {"Authorization: Bearer key"};
  options.timeout_s = 0.3;
  options.answer_bytes_max = 1'000;
  HttpClient client(options);
  HttpAnswer answer = client.send(server.address() + "/x", "{}");
  EXPECT_EQ(answer.kind, Kind::answered);
  EXPECT_EQ(answer.status, 200);
  EXPECT_EQ(answer.body, "POST {}");
  EXPECT_EQ(client.send(server.address() + "/y").body, "GET ") << "a body is not sent again";
  EXPECT_EQ(client.send(server.address() + "/none").status, 404);
  EXPECT_EQ(client.send(server.address() + "/moved").status, 302) << "no redirect is followed";
  for (const HttpServer::Request& request : server.requests()) {
    EXPECT_THAT(request.head, HasSubstr("\r\nAuthorization: Bearer key"));
  }
  EXPECT_EQ(client.send(server.address() + "/large").kind, Kind::too_large);
  answer = client.send(server.address() + "/late");
  EXPECT_EQ(answer.kind, Kind::late);
  EXPECT_EQ(answer.status, 0);
  EXPECT_NE(answer.problem, "");
  EXPECT_EQ(client.send("http://127.0.0.1:9/").kind, Kind::failed);
  EXPECT_EQ(client.send("file:///etc/hostname").kind, Kind::failed);
  EXPECT_EQ(client.escape("a b/c"), "a%20b%2Fc");
}

}  // namespace
}  // namespace tailor
