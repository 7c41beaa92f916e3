// This file tests what settings are refused, and the defaults.

package health

import (
	"encoding/json"
	"testing"
	"time"
)

// checks is what both kinds of settings are.
type checks interface{ Check() error }

func TestCheck(t *testing.T) {
	for _, test := range []struct{ name, json, want string }{
		{"ws", `{"ws":{}}`, ""},
		{"all", `{"interval":"1s","timeout":"2s","fails":1,"passes":7,"ws":{},"http":{}}`, ""},
		{"nothing", `{}`, "an active health check needs health_ws or health_http"},
		{"interval alone", `{"interval":"1s","fails":3}`, "health_interval needs health_ws or health_http"},
		{"timeout alone", `{"timeout":"1s"}`, "health_timeout needs health_ws or health_http"},
		{"fails alone", `{"fails":1,"passes":1}`, "health_fails needs health_ws or health_http"},
		{"passes alone", `{"passes":1}`, "health_passes needs health_ws or health_http"},
		{"zero interval", `{"interval":0,"ws":{}}`, "health_interval must be positive: 0s"},
		{"negative interval", `{"interval":"-1s","ws":{}}`, "health_interval must be positive: -1s"},
		{"zero timeout", `{"timeout":0,"ws":{}}`, "health_timeout must be positive: 0s"},
		{"zero fails", `{"fails":0,"ws":{}}`, "health_fails must be at least 1: 0"},
		{"negative passes", `{"passes":-1,"ws":{}}`, "health_passes must be at least 1: -1"},

		{"relative URI", `{"http":{"uri":"x"}}`, `health_http: invalid URI "x": it must begin with /`},
		{"two slashes", `{"http":{"uri":"//x"}}`, ""},
		{"port 0", `{"ws":{"port":0}}`, `health_ws: port: invalid port "0"`},
		{"no status", `{"ws":{"expect_status":[]}}`, ""},
		{"bad status", `{"ws":{"expect_status":["1"]}}`, `health_ws: expect_status: invalid status "1"`},
		{"Host twice, spelled differently", `{"ws":{"headers":{"Host":["a"],"host":["b"]}}}`, "health_ws: header: more than one Host"},
		{"own header", `{"http":{"headers":{"te":["trailers"]}}}`, `health_http: header: "Te" is up to the check`},
		{"null rule", `{"ws":{"expect_headers":[null]}}`, `health_ws: expect_header: invalid field ""`},
		{"rule without a field", `{"ws":{"expect_headers":[{"value":"x"}]}}`, `health_ws: expect_header: invalid field ""`},
		{"value and pattern", `{"ws":{"expect_headers":[{"field":"x","value":"","pattern":"y"}]}}`, `health_ws: expect_header: X: value "" and pattern "y" exclude each other`},
		{"bad pattern", `{"ws":{"expect_headers":[{"field":"x","pattern":"("}]}}`, `health_ws: expect_header: invalid regexp "("`},
		{"both bad: the first", `{"ws":{"port":0},"http":{"port":0}}`, "health_ws: port"},
	} {
		t.Run(test.name, func(t *testing.T) { check(t, new(Active), test.json, test.want) })
	}
}

func TestCheckLayer4(t *testing.T) {
	for _, test := range []struct{ name, json, want string }{
		{"tcp", `{"tcp":true}`, ""},
		{"tls", `{"tls":{}}`, ""},
		{"all", `{"interval":"1s","port":81,"tcp":true,"tls":{"server_name":"x"}}`, ""},
		{"nothing", `{}`, "an active health check needs health_tcp or health_tls"},
		{"tcp off", `{"tcp":false,"fails":1}`, "health_fails needs health_tcp or health_tls"},
		{"port alone", `{"port":81}`, "health_port needs health_tcp or health_tls"},
		{"bad port", `{"port":65536,"tcp":true}`, `health_port: invalid port "65536"`},
		{"bad interval", `{"interval":-1,"tcp":true}`, "health_interval must be positive: -1ns"},
	} {
		t.Run(test.name, func(t *testing.T) { check(t, new(ActiveLayer4), test.json, test.want) })
	}
}

func check(t *testing.T, into checks, text, want string) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatal(err)
	}
	compare(t, into.Check(), want)
}

func TestSpecHasDefaults(t *testing.T) {
	for text, want := range map[string]Spec{
		`{}`: {Interval: time.Minute, Timeout: 3 * time.Second, Fails: 1, Passes: 1},
		`{"interval":"1s","timeout":"2s","fails":3,"passes":4}`: {Interval: time.Second, Timeout: 2 * time.Second, Fails: 3, Passes: 4},
	} {
		var s Schedule
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			t.Fatal(err)
		}
		got := s.Spec()
		if got.Interval != want.Interval || got.Timeout != want.Timeout || got.Fails != want.Fails || got.Passes != want.Passes {
			t.Errorf("%s: got %v, want %v", text, got, want)
		}
	}
}
