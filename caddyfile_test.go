// The Caddyfile syntax, good and bad, by fixtures.
package holdfast_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	holdfast "github.com/holdfast-proxy/caddy-holdfast"
)

var update = flag.Bool("update", false, "rewrite the JSON of the good fixtures")

// A good fixture is a Caddyfile, a line of dashes, and the JSON it adapts to,
// which must also provision.
func TestAdaptGood(t *testing.T) {
	for _, file := range fixtures(t, "good") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			const line = "\n----------\n"
			input, want, _ := strings.Cut(read(t, file), line)
			input = strings.TrimRight(input, "\n")
			got, err := adapt(input)
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				if err := os.WriteFile(file, []byte(input+"\n"+line+got), 0o600); err != nil {
					t.Fatal(err)
				}
				want = got
			}
			if got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if err := provision(t, got); err != nil {
				t.Errorf("provisioning: %v", err)
			}
		})
	}
}

// A bad fixture begins with a comment that has a part of the error, which comes
// when the Caddyfile is adapted, or at the latest when it is provisioned.
func TestAdaptBad(t *testing.T) {
	for _, file := range fixtures(t, "bad") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			input := read(t, file)
			first, _, _ := strings.Cut(input, "\n")
			want, ok := strings.CutPrefix(first, "# error: ")
			if !ok {
				t.Fatal("the fixture does not say its error")
			}
			config, err := adapt(input)
			if err == nil {
				err = provision(t, config)
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error: got %v, want one with %q", err, want)
			}
		})
	}
}

// A config that only says what is the default adapts and provisions like one
// that says nothing, and JSON takes durations as strings.
func TestJSONWithoutCaddyfile(t *testing.T) {
	err := provision(t, `{"apps":{"http":{"servers":{"s":{"listen":["127.0.0.1:0"],"routes":[{"handle":[{
		"handler":"websocket_proxy","upstreams":[{"dial":"app:8080"}],
		"transport":{"dial_timeout":"3s","handshake_timeout":"10s"},
		"keep_alive":{"ping_interval":"30s","idle_timeout":0},
		"resume":{"timeout":"30s","min_interval":"100ms","max_interval":"5s","concurrency":64,"close_codes":[1001,1012,1013],"limit":3},
		"replay":{"mode":"unacked","buffer":5242880,"overflow":"pause"},"drain_window":"10s",
		"compression":"on"}]}]}}},"connection_registry":{"replay_memory":1073741824}}}`)
	if err != nil {
		t.Error(err)
	}
}

// What JSON can say is refused like what a Caddyfile can.
func TestJSONErrors(t *testing.T) {
	for name, c := range map[string]struct{ fields, want string }{
		"no upstream":     {``, "no upstreams"},
		"empty address":   {`"upstreams":[{}]`, `upstream "": empty address`},
		"unknown field":   {`"upstream":[]`, "upstream"},
		"unknown policy":  {app + `"load_balancing":{"selection_policy":{"policy":"first"}}`, `unknown lb_policy "first"`},
		"bad compression": {app + `"compression":"brotli"`, `unknown compression mode "brotli"`},

		"zero dial":             {app + `"transport":{"dial_timeout":0}`, "dial_timeout must be positive: 0s"},
		"negative timeout":      {app + `"resume":{"timeout":"-1s"}`, "resume_timeout must not be negative: -1s"},
		"zero min_interval":     {app + `"resume":{"min_interval":0}`, "resume_interval must be positive: 0s"},
		"max below default min": {app + `"resume":{"max_interval":"1ms"}`, "resume_interval: the longest, 1ms, must not be shorter than the shortest, 100ms"},
		"zero concurrency":      {app + `"resume":{"concurrency":0}`, "resume_concurrency must be at least 1: 0"},
		"negative limit":        {app + `"resume":{"limit":-1}`, "resume_limit must be at least 0: -1"},
		"no close code":         {app + `"resume":{"close_codes":[1001,1006]}`, "resume_on: 1006 is no close code"},
		"close code too large":  {app + `"resume":{"close_codes":[65536]}`, "65536 into Go struct field Resume.resume.close_codes"},
		"negative close code":   {app + `"resume":{"close_codes":[-1]}`, "-1 into Go struct field Resume.resume.close_codes"},
		"unknown in resume":     {app + `"resume":{"max":1}`, `unknown field "max"`},
		"unknown mode":          {app + `"replay":{"mode":"all"}`, `unknown replay "all": want unacked, unsent, strict or off`},
		"zero buffer":           {app + `"replay":{"buffer":0}`, "replay_buffer must be positive: 0"},
		"negative buffer":       {app + `"replay":{"buffer":-5}`, "replay_buffer must be positive: -5"},
		"buffer with a unit":    {app + `"replay":{"buffer":"5MiB"}`, "string into Go struct field Replay.replay.buffer"},
		"buffer too large":      {app + `"replay":{"buffer":9223372036854775808}`, "into Go struct field Replay.replay.buffer"},
		"unknown overflow":      {app + `"replay":{"overflow":"drop"}`, `unknown replay_overflow "drop": want pause or close`},
		"negative window":       {app + `"drain_window":"-1s"`, "drain_window must not be negative: -1s"},
	} {
		t.Run(name, func(t *testing.T) {
			fields := strings.TrimRight(`"handler":"websocket_proxy",`+c.fields, ",")
			err := provision(t, `{"apps":{"http":{"servers":{"s":{"listen":["127.0.0.1:0"],"routes":[{"handle":[{`+fields+`}]}]}}}}}`)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error: got %v, want one with %q", err, c.want)
			}
		})
	}
}

// app is a handler's upstream, before more of its fields.
const app = `"upstreams":[{"dial":"app:8080"}],`

func TestRegistryJSONErrors(t *testing.T) {
	for registry, want := range map[string]string{
		`{"orphan_timeout":-1}`:       "orphan_timeout must not be negative: -1ns",
		`{"shutdown_timeout":"-1s"}`:  "shutdown_timeout must not be negative: -1s",
		`{"replay_memory":0}`:         "replay_memory must be positive: 0",
		`{"replay_memory":-5}`:        "replay_memory must be positive: -5",
		`{"replay_memory":"1GiB"}`:    "string into Go struct field ConnectionRegistry.replay_memory",
		`{"replay_memory":1e30}`:      "1e30 into Go struct field ConnectionRegistry.replay_memory",
		`{"replay_memory_limit":100}`: `unknown field "replay_memory_limit"`,
	} {
		t.Run(registry, func(t *testing.T) {
			err := provision(t, `{"apps":{"connection_registry":`+registry+`}}`)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error: got %v, want one with %q", err, want)
			}
		})
	}
}

// docs/json.md has a row for every field, and the fixture with everything has it.
func TestEveryFieldIsDocumentedAndAdapted(t *testing.T) {
	docs := read(t, "docs/json.md")
	_, everything, _ := strings.Cut(read(t, "testdata/adapt/good/everything.caddyfiletest"), "\n----------\n")
	for _, path := range slices.Concat(
		fields(reflect.TypeFor[holdfast.WebSocketProxy](), ""),
		fields(reflect.TypeFor[holdfast.ConnectionRegistry](), ""),
	) {
		if !strings.Contains(docs, "\n| `"+path+"` |") && !strings.Contains(docs, "\n| `"+path+".") {
			t.Errorf("docs/json.md has no row for %s", path)
		}
		if name := path[strings.LastIndex(path, ".")+1:]; !strings.Contains(everything, `"`+name+`":`) {
			t.Errorf("the fixture with everything has no %s", path)
		}
	}
}

// fields returns the paths of the JSON fields of a struct, like `upstreams[].dial`.
func fields(t reflect.Type, prefix string) []string {
	var paths []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" {
			continue
		}
		path, of := prefix+name, f.Type
		if of.Kind() == reflect.Slice && of.Elem().Kind() == reflect.Pointer {
			path, of = path+"[]", of.Elem()
		}
		if of.Kind() == reflect.Pointer && of.Elem().Kind() == reflect.Struct {
			paths = append(paths, fields(of.Elem(), path+".")...)
		} else {
			paths = append(paths, path)
		}
	}
	return paths
}

// adapt returns the indented JSON of a Caddyfile.
func adapt(input string) (string, error) {
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return "", err
	}
	for _, w := range warnings {
		if !strings.Contains(w.Message, "not formatted") {
			return "", errors.New(w.Message)
		}
	}
	var out bytes.Buffer
	if err := json.Indent(&out, config, "", "\t"); err != nil {
		return "", err
	}
	out.WriteByte('\n')
	return out.String(), nil
}

// provision loads a config up to the point before it starts.
func provision(t *testing.T, config string) error {
	t.Helper()
	cfg := new(caddy.Config)
	if err := caddy.StrictUnmarshalJSON([]byte(config), cfg); err != nil {
		return err
	}
	cfg.StorageRaw = json.RawMessage(`{"module":"file_system","root":"` + t.TempDir() + `"}`)
	cfg.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{"default": {BaseLog: caddy.BaseLog{Level: "FATAL"}}}}
	return caddy.Validate(cfg)
}

func fixtures(t *testing.T, kind string) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/adapt/" + kind + "/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	return files
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
