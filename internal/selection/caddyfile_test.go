// This file tests the syntax, good and bad.

package selection

import (
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// parseText parses the text as a block has it, and fails the test unless the
// dispenser goes on after it.
func parseText(t *testing.T, text string) (string, error) {
	t.Helper()
	d := caddyfile.NewTestDispenser("proxy {\n" + text + "\nnext\n}")
	d.Next()
	if !d.NextBlock(0) || d.Val() != "lb_policy" {
		t.Fatalf("got %q, want lb_policy", d.Val())
	}
	raw, err := ParseCaddyfile(d)
	if err == nil && (!d.NextBlock(0) || d.Val() != "next" || d.NextBlock(0)) {
		t.Errorf("got to %q after it, want the next subdirective and the end", d.Val())
	}
	return string(raw), err
}

func TestCaddyfileGood(t *testing.T) {
	for text, want := range map[string]string{
		"random":                          `{"policy":"random"}`,
		"random_choose 3":                 `{"choose":3,"policy":"random_choose"}`,
		"least_conn":                      `{"policy":"least_conn"}`,
		"round_robin":                     `{"policy":"round_robin"}`,
		"weighted_round_robin 6 0 3":      `{"policy":"weighted_round_robin","weights":[6,0,3]}`,
		"first":                           `{"policy":"first"}`,
		"ip_hash":                         `{"policy":"ip_hash"}`,
		"client_ip_hash":                  `{"policy":"client_ip_hash"}`,
		"uri_hash":                        `{"policy":"uri_hash"}`,
		"query room":                      `{"key":"room","policy":"query"}`,
		"header X-Room":                   `{"field":"X-Room","policy":"header"}`,
		"cookie":                          `{"policy":"cookie"}`,
		"cookie {\n}":                     `{"policy":"cookie"}`,
		"cookie home":                     `{"name":"home","policy":"cookie"}`,
		"cookie home s":                   `{"name":"home","policy":"cookie","secret":"s"}`,
		"test_probe":                      `{"policy":"test_probe"}`,
		"test_plain":                      `{"policy":"test_plain"}`,
		"test_probe km":                   `{"policy":"test_probe","unit":"km"}`,
		"query room {\nfallback first\n}": `{"fallback":{"policy":"first"},"key":"room","policy":"query"}`,
		"header X {\nfallback random_choose 2\n}":                       `{"fallback":{"choose":2,"policy":"random_choose"},"field":"X","policy":"header"}`,
		"cookie a {\nmax_age 1h\nfallback least_conn\n}":                `{"fallback":{"policy":"least_conn"},"max_age":3600000000000,"name":"a","policy":"cookie"}`,
		"cookie a {\nfallback cookie b {\nfallback query q\n}\n}":       `{"fallback":{"fallback":{"key":"q","policy":"query"},"name":"b","policy":"cookie"},"name":"a","policy":"cookie"}`,
		"cookie a {\nfallback query q {\nfallback first\n}\n}":          `{"fallback":{"fallback":{"policy":"first"},"key":"q","policy":"query"},"name":"a","policy":"cookie"}`,
		"header fallback {\nfallback weighted_round_robin 1 2\n}":       `{"fallback":{"policy":"weighted_round_robin","weights":[1,2]},"field":"fallback","policy":"header"}`,
		"cookie a {\nfallback cookie b {\nmax_age 1s\n}\nmax_age 2s\n}": `{"fallback":{"max_age":1000000000,"name":"b","policy":"cookie"},"max_age":2000000000,"name":"a","policy":"cookie"}`,
	} {
		t.Run(text, func(t *testing.T) {
			got, err := parseText(t, "lb_policy "+text)
			if err != nil || got != want {
				t.Errorf("got %s and error %v, want %s", got, err, want)
			}
			mustLoad(t, got, false)
		})
	}
}

func TestCaddyfileBad(t *testing.T) {
	for text, want := range map[string]string{
		"":                                `lb_policy: missing argument`,
		"best":                            `unknown lb_policy "best": want one of client_ip_hash, cookie, first,`,
		`""`:                              `unknown lb_policy ""`,
		"Random":                          `unknown lb_policy "Random"`,
		"test_none":                       `lb_policy "test_none" cannot be used in a Caddyfile: it is a *selection.notAPolicy`,
		"random 1":                        `lb_policy "random": wrong argument count or unexpected line ending after '1'`,
		"random {\na\n}":                  `lb_policy "random": surplus block`,
		"random_choose":                   `lb_policy "random_choose": wrong argument count`,
		"random_choose x":                 `lb_policy "random_choose": invalid choice value 'x'`,
		"random_choose 2 3":               `lb_policy "random_choose": surplus argument "3"`,
		"random_choose 2 {\na\n}":         `lb_policy "random_choose": surplus block`,
		"least_conn 1":                    `lb_policy "least_conn": wrong argument count or unexpected line ending after '1'`,
		"round_robin 1":                   `lb_policy "round_robin": wrong argument count or unexpected line ending after '1'`,
		"weighted_round_robin":            `lb_policy "weighted_round_robin": wrong argument count`,
		"weighted_round_robin 1 x":        `lb_policy "weighted_round_robin": invalid weight value 'x'`,
		"weighted_round_robin 1 -1":       `lb_policy "weighted_round_robin": invalid weight value '-1'`,
		"weighted_round_robin 1 {\n2}":    `lb_policy "weighted_round_robin": surplus block`,
		"first 1":                         `lb_policy "first": wrong argument count or unexpected line ending after '1'`,
		"ip_hash 1":                       `lb_policy "ip_hash": wrong argument count or unexpected line ending after '1'`,
		"client_ip_hash 1":                `lb_policy "client_ip_hash": wrong argument count or unexpected line ending after '1'`,
		"uri_hash 1":                      `lb_policy "uri_hash": wrong argument count or unexpected line ending after '1'`,
		"query":                           `lb_policy "query": wrong argument count`,
		"query a b":                       `lb_policy "query": surplus argument "b"`,
		"header":                          `lb_policy "header": wrong argument count`,
		"header A b":                      `lb_policy "header": surplus argument "b"`,
		"header A b {\nfallback first\n}": `lb_policy "header": surplus argument "b"`,
		"cookie a b c":                    `lb_policy "cookie": wrong argument count or unexpected line ending after 'c'`,
		"cookie a {\nmax_age 1x\n}":       `lb_policy "cookie": invalid duration: 1x`,
		"cookie a {\nmax_age 1s 2s\n}":    `lb_policy "cookie": wrong argument count or unexpected line ending after '2s'`,
		"cookie a {\nsecure\n}":           `lb_policy "cookie": unrecognized option 'secure'`,
		"cookie a {\nfallback\n}":         `lb_policy "cookie": wrong argument count`,
		"cookie a {\nfallback best\n}":    `unknown lb_policy "best"`,
		"cookie a {\nfallback first\nfallback first\n}":          `lb_policy "cookie": fallback selection policy already specified`,
		"query a {\nfallback first b\n}":                         `lb_policy "first": wrong argument count or unexpected line ending after 'b'`,
		"query a {\nfallback random_choose 2 3\n}":               `lb_policy "random_choose": surplus argument "3"`,
		"query a {\nfallback header b c\n}":                      `lb_policy "header": surplus argument "c"`,
		"cookie a {\nfallback query b {\nfallback first c\n}\n}": `lb_policy "first": wrong argument count`,
		"query a {\nfallback cookie\n}":                          `lb_policy: "cookie" cannot be a fallback of query or header`,
		"test_plain a":                                           `lb_policy "test_plain": surplus argument "a"`,
		"test_plain {\na\n}":                                     `lb_policy "test_plain": surplus block`,
		"query \"\" b":                                           `lb_policy "query": surplus argument "b"`,
		"test_probe a b":                                         `lb_policy "test_probe": surplus argument "b"`,
		"test_probe a {\nb\n}":                                   `lb_policy "test_probe": surplus block`,
	} {
		t.Run(text, func(t *testing.T) {
			got, err := parseText(t, "lb_policy "+text)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Fatalf("got %s and error %v, want one with %q", got, err, want)
			}
			if n := strings.Count(err.Error(), "Testfile:"); n != 1 {
				t.Errorf("got error %v, want it to say once where", err)
			}
		})
	}
}
