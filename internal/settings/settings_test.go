// The defaults and the checks of the settings.
package settings_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
	"github.com/holdfast-proxy/caddy-holdfast/internal/settings"
)

// groups are the settings as a handler has them.
type groups struct {
	Transport   *settings.Transport `json:"transport"`
	KeepAlive   *settings.KeepAlive `json:"keep_alive"`
	Resume      *settings.Resume    `json:"resume"`
	Replay      *settings.Replay    `json:"replay"`
	Limits      *settings.Limits    `json:"limits"`
	DrainWindow *caddy.Duration     `json:"drain_window"`
}

func parse(t *testing.T, config string) (settings.Live, *settings.Transport) {
	t.Helper()
	var g groups
	if err := caddy.StrictUnmarshalJSON([]byte(config), &g); err != nil {
		t.Fatal(err)
	}
	return settings.Live{
		KeepAlive: g.KeepAlive, Resume: g.Resume, Replay: g.Replay, Limits: g.Limits, DrainWindow: g.DrainWindow,
	}, g.Transport
}

// parseSession parses a config that passes the checks.
func parseSession(t *testing.T, config string) session.Settings {
	t.Helper()
	l, transport := parse(t, config)
	if err := l.Check(transport); err != nil {
		t.Fatal(err)
	}
	s, err := l.Session()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The defaults that are promised, written down a second time.
func TestDefaults(t *testing.T) {
	want := session.Settings{
		PingInterval: 30 * time.Second,
		PingTimeout:  30 * time.Second,
		WriteTimeout: 30 * time.Second,

		ResumeTimeout: 30 * time.Second,
		ResumeMin:     100 * time.Millisecond,
		ResumeMax:     5 * time.Second,
		ResumeOn:      []uint16{1001, 1012, 1013},
		ResumeLimit:   3,
		Replay:        replay.Unacked,
		ReplayBuffer:  5242880,
		DrainWindow:   10 * time.Second,
	}
	for name, config := range map[string]string{
		"no groups":    `{}`,
		"null groups":  `{"transport":null,"keep_alive":null,"resume":null,"replay":null,"limits":null,"drain_window":null}`,
		"empty groups": `{"transport":{},"keep_alive":{},"resume":{},"replay":{},"limits":{}}`,
		"null fields": `{"keep_alive":{"ping_interval":null},"resume":{"timeout":null,"close_codes":null,"limit":null},
			"replay":{"mode":"","buffer":null,"overflow":""},"limits":{"max_connections":null,"client_max_message_size":null}}`,
		"said": `{"keep_alive":{"ping_interval":"30s","ping_timeout":"30s","idle_timeout":0,"first_data_timeout":0,"max_lifetime":0,"write_timeout":"30s"},
			"resume":{"timeout":"30s","min_interval":"100ms","max_interval":"5s","concurrency":64,"close_codes":[1001,1012,1013],"limit":3},
			"replay":{"mode":"unacked","buffer":5242880,"overflow":"pause"},"drain_window":"10s",
			"limits":{"client_max_message_size":0,"server_max_message_size":0}}`,
	} {
		t.Run(name, func(t *testing.T) {
			if got := parseSession(t, config); !reflect.DeepEqual(got, want) {
				t.Errorf("got\n%+v\nwant\n%+v", got, want)
			}
		})
	}
	for name, c := range map[string]struct{ got, want any }{
		"dial_timeout":       {settings.DialTimeout, 3 * time.Second},
		"handshake_timeout":  {settings.HandshakeTimeout, 10 * time.Second},
		"resume_concurrency": {settings.ResumeConcurrency, 64},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %v, want %v", name, c.got, c.want)
		}
	}
}

func TestZeroIsNotUnset(t *testing.T) {
	got := parseSession(t, `{
		"keep_alive":{"ping_interval":0,"idle_timeout":0,"first_data_timeout":0,"max_lifetime":0,"write_timeout":0},
		"resume":{"timeout":0,"close_codes":[],"limit":0},"drain_window":0}`)
	want := session.Settings{
		PingTimeout:  30 * time.Second,
		ResumeMin:    100 * time.Millisecond,
		ResumeMax:    5 * time.Second,
		ResumeOn:     []uint16{},
		ReplayBuffer: 5 << 20,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

func TestEverySettingArrives(t *testing.T) {
	got := parseSession(t, `{
		"keep_alive":{"ping_interval":"1s","ping_timeout":"2s","idle_timeout":"3s","first_data_timeout":"4s","max_lifetime":"5s","write_timeout":"6s"},
		"resume":{"timeout":"7s","min_interval":"8s","max_interval":"9s","close_codes":[4000],"limit":10},
		"replay":{"mode":"strict","buffer":11,"overflow":"close"},"drain_window":"12s",
		"limits":{"max_connections":13,"max_connections_per_ip":14,"client_max_message_size":15,"server_max_message_size":16}}`)
	want := session.Settings{
		PingInterval: 1 * time.Second, PingTimeout: 2 * time.Second, IdleTimeout: 3 * time.Second,
		FirstDataTimeout: 4 * time.Second, MaxLifetime: 5 * time.Second, WriteTimeout: 6 * time.Second,
		ResumeTimeout: 7 * time.Second, ResumeMin: 8 * time.Second, ResumeMax: 9 * time.Second,
		ResumeOn: []uint16{4000}, ResumeLimit: 10,
		Replay: replay.Strict, ReplayBuffer: 11, ReplayClose: true, DrainWindow: 12 * time.Second,
		ClientMaxMessage: 15, ServerMaxMessage: 16,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	for field, v := range reflect.ValueOf(got).Fields() {
		if v.IsZero() {
			t.Errorf("%s: no setting here gives it a value", field.Name)
		}
	}
}

func TestMaxIntervalIsAtLeastMinInterval(t *testing.T) {
	for resume, want := range map[string]time.Duration{
		`{}`:                       5 * time.Second,
		`{"min_interval":"1ns"}`:   5 * time.Second,
		`{"min_interval":"5s"}`:    5 * time.Second,
		`{"min_interval":"1m"}`:    time.Minute,
		`{"max_interval":"100ms"}`: 100 * time.Millisecond,
		`{"min_interval":"1m","max_interval":"2m"}`: 2 * time.Minute,
	} {
		if got := parseSession(t, `{"resume":`+resume+`}`).ResumeMax; got != want {
			t.Errorf("%s: got %s, want %s", resume, got, want)
		}
	}
}

// What means nothing is refused by the name that it has in a Caddyfile, and with
// its value.
func TestCheck(t *testing.T) {
	for config, want := range map[string]string{
		`{"transport":{"dial_timeout":0}}`:                                       "dial_timeout must be positive: 0s",
		`{"transport":{"dial_timeout":"-1s"}}`:                                   "dial_timeout must be positive: -1s",
		`{"transport":{"handshake_timeout":0}}`:                                  "handshake_timeout must be positive: 0s",
		`{"keep_alive":{"ping_interval":-1}}`:                                    "ping_interval must not be negative: -1ns",
		`{"keep_alive":{"ping_timeout":0}}`:                                      "ping_timeout must be positive: 0s",
		`{"keep_alive":{"idle_timeout":"-1s"}}`:                                  "idle_timeout must not be negative: -1s",
		`{"keep_alive":{"first_data_timeout":"-1s"}}`:                            "first_data_timeout must not be negative: -1s",
		`{"keep_alive":{"max_lifetime":"-1d"}}`:                                  "max_lifetime must not be negative: -24h0m0s",
		`{"keep_alive":{"write_timeout":"-1s"}}`:                                 "write_timeout must not be negative: -1s",
		`{"resume":{"timeout":"-1s"}}`:                                           "resume_timeout must not be negative: -1s",
		`{"resume":{"min_interval":0}}`:                                          "resume_interval must be positive: 0s",
		`{"resume":{"min_interval":"-1s"}}`:                                      "resume_interval must be positive: -1s",
		`{"resume":{"max_interval":0}}`:                                          "resume_interval must be positive: 0s",
		`{"resume":{"max_interval":"-1s"}}`:                                      "resume_interval must be positive: -1s",
		`{"resume":{"min_interval":"2s","max_interval":"1s"}}`:                   "resume_interval: the longest, 1s, must not be shorter than the shortest, 2s",
		`{"resume":{"max_interval":"99ms"}}`:                                     "resume_interval: the longest, 99ms, must not be shorter than the shortest, 100ms",
		`{"resume":{"concurrency":0}}`:                                           "resume_concurrency must be at least 1: 0",
		`{"resume":{"concurrency":-1}}`:                                          "resume_concurrency must be at least 1: -1",
		`{"resume":{"limit":-1}}`:                                                "resume_limit must be at least 0: -1",
		`{"resume":{"close_codes":[1001,999]}}`:                                  "resume_on: 999 is no close code that a backend can send",
		`{"resume":{"close_codes":[1005]}}`:                                      "resume_on: 1005 is no close code that a backend can send",
		`{"resume":{"close_codes":[1006]}}`:                                      "resume_on: 1006 is no close code that a backend can send",
		`{"resume":{"close_codes":[1015]}}`:                                      "resume_on: 1015 is no close code that a backend can send",
		`{"resume":{"close_codes":[5000]}}`:                                      "resume_on: 5000 is no close code that a backend can send",
		`{"replay":{"mode":"Strict"}}`:                                           `unknown replay "Strict": want unacked, unsent, strict or off`,
		`{"replay":{"buffer":0}}`:                                                "replay_buffer must be positive: 0",
		`{"replay":{"buffer":-5}}`:                                               "replay_buffer must be positive: -5",
		`{"replay":{"overflow":"drop"}}`:                                         `unknown replay_overflow "drop": want pause or close`,
		`{"drain_window":"-1s"}`:                                                 "drain_window must not be negative: -1s",
		`{"limits":{"max_connections":-1}}`:                                      "max_connections must be at least 0: -1",
		`{"limits":{"max_connections_per_ip":-2}}`:                               "max_connections_per_ip must be at least 0: -2",
		`{"limits":{"client_max_message_size":-1}}`:                              "client_max_message_size must be at least 0: -1",
		`{"limits":{"server_max_message_size":-9223372036854775808}}`:            "server_max_message_size must be at least 0: -9223372036854775808",
		`{"resume":{"timeout":0,"concurrency":0}}`:                               "resume_concurrency", // also where it is not used
		`{"replay":{"mode":"off","buffer":0}}`:                                   "replay_buffer",
		`{"resume":{"close_codes":[]},"replay":{"mode":"off","overflow":"off"}}`: "replay_overflow",
	} {
		l, transport := parse(t, config)
		if err := l.Check(transport); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error: got %v, want one with %q", config, err, want)
		}
	}
}

// The least and the greatest that is legal.
func TestCheckBounds(t *testing.T) {
	for _, config := range []string{
		`{"transport":{"dial_timeout":1,"handshake_timeout":1},"keep_alive":{"ping_timeout":1}}`,
		`{"resume":{"min_interval":1,"max_interval":1,"concurrency":1,"close_codes":[1000,1014,3000,4999,4999]},"replay":{"buffer":1}}`,
		`{"replay":{"buffer":9223372036854775807}}`,
		`{"limits":{"max_connections":0,"max_connections_per_ip":0,"client_max_message_size":0,"server_max_message_size":0}}`,
		`{"limits":{"max_connections":1,"max_connections_per_ip":1,"client_max_message_size":1,"server_max_message_size":9223372036854775807}}`,
	} {
		l, transport := parse(t, config)
		if err := l.Check(transport); err != nil {
			t.Errorf("%s: %v", config, err)
		}
	}
}

// Unset stays unset when a config is written out, and zero stays zero: what is
// compared between configs, and shown by the admin API, is what was said.
func TestJSONKeepsUnsetAndZeroApart(t *testing.T) {
	for _, config := range []string{
		`{"transport":{},"keep_alive":{},"resume":{},"replay":{},"limits":{},"drain_window":0}`,
		`{"transport":{},"keep_alive":{"ping_interval":0},"resume":{"timeout":0,"close_codes":[],"limit":0},"replay":{"mode":"off"},` +
			`"limits":{"max_connections":0,"max_connections_per_ip":0,"client_max_message_size":0,"server_max_message_size":0},"drain_window":1}`,
	} {
		var g groups
		if err := json.Unmarshal([]byte(config), &g); err != nil {
			t.Fatal(err)
		}
		got, err := json.Marshal(g)
		if err != nil || string(got) != config {
			t.Errorf("got %s, error %v, want %s", got, err, config)
		}
	}
}
