// The Caddyfile syntax, good and bad.
package holdfast_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

var update = flag.Bool("update", false, "rewrite the JSON of the good fixtures")

// line is what stands between the Caddyfile and the JSON of a good fixture.
const line = "\n----------\n"

// A good fixture is a Caddyfile, a line of dashes, and the JSON it adapts to,
// which must also provision.
func TestAdaptGood(t *testing.T) {
	for _, file := range fixtures(t, "good/*") {
		t.Run(filepath.Base(file), func(t *testing.T) {
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
			t.Chdir(certificates(t))
			if err := provision(t, got); err != nil {
				t.Errorf("provisioning: %v", err)
			}
		})
	}
}

// blocks are what a bad fixture's cases stand in, by its folder.
var blocks = map[string]string{
	"bad":                 "%s",
	"websocket_proxy":     "example.com {\nwebsocket_proxy app:8080 {\n%s\n}\n}\n",
	"sni_passthrough":     "{\nlayer4 {\n:443 {\nroute {\nsni_passthrough app:8080 {\n%s\n}\n}\n}\n}\n}\n",
	"connection_registry": "{\nconnection_registry {\n%s\n}\n}\nexample.com {\nrespond ok\n}\n",
}

// A bad fixture is cases, each begun by a comment that has a part of the error,
// which comes when the Caddyfile is adapted, or at the latest when it is
// provisioned.
func TestAdaptBad(t *testing.T) {
	for _, file := range append(fixtures(t, "bad/*"), fixtures(t, "bad/*/*")...) {
		block := blocks[filepath.Base(filepath.Dir(file))]
		cases := strings.Split("\n"+read(t, file), "\n# error: ")
		if block == "" || cases[0] != "" || len(cases) == 1 {
			t.Fatalf("%s does not begin with its error", file)
		}
		for _, c := range cases[1:] {
			want, text, _ := strings.Cut(c, "\n")
			t.Run(filepath.Base(file)+"/"+want, func(t *testing.T) {
				wantError(t, load(t, fmt.Sprintf(block, text)), want)
			})
		}
	}
}

// any number of arguments.
const many = math.MaxInt

// syntax is which arguments a subdirective takes.
type syntax struct {
	valid       string // as many as it may have, or an example
	least, most int
	block       bool // it may have one
	repeatable  bool
}

var one = func(valid string) syntax { return syntax{valid: valid, least: 1, most: 1} }

// subdirectives are all that there are, by the directive.
var subdirectives = map[string]map[string]syntax{
	"connection_registry": {
		"max_connections":        one("5"),
		"max_connections_per_ip": {valid: "5 64", least: 1, most: 2},
		"replay_memory":          one("1GiB"),
		"orphan_timeout":         one("1s"),
		"shutdown_timeout":       one("1s"),
	},
	"websocket_proxy": {
		"name":                     one("chat"),
		"to":                       {valid: "other:8080", least: 1, most: many},
		"dynamic":                  {valid: "a app 80", least: 1, most: many, block: true},
		"upstream_max_connections": one("5"),

		"lb_policy":       {valid: "first", least: 1, most: many, block: true},
		"lb_retries":      one("5"),
		"lb_try_duration": one("5s"),
		"lb_try_interval": one("1s"),

		"dial_timeout":      one("1s"),
		"handshake_timeout": one("1s"),
		"proxy_protocol":    one("v2"),

		"tls":                      {},
		"tls_client_auth":          {valid: "a b", least: 1, most: 2},
		"tls_curves":               {valid: "x25519", least: 1, most: many},
		"tls_except_ports":         {valid: "80", least: 1, most: many},
		"tls_insecure_skip_verify": {},
		"tls_renegotiation":        one("never"),
		"tls_server_name":          one("app"),
		"tls_timeout":              one("1s"),
		"tls_trust_pool":           {valid: "file a", least: 1, most: many, block: true},
		"tls_trusted_ca_certs":     {valid: "a", least: 1, most: many},

		"health_interval": one("1s"),
		"health_timeout":  one("1s"),
		"health_fails":    one("5"),
		"health_passes":   one("5"),
		"health_ws":       {valid: "/", most: 1, block: true},
		"health_http":     {valid: "/", most: 1, block: true},

		"fail_duration":        one("1s"),
		"max_fails":            one("5"),
		"unhealthy_latency":    one("1s"),
		"migrate_on_unhealthy": {},

		"resume_timeout":     one("1s"),
		"resume_interval":    {valid: "1s 2s", least: 1, most: 2},
		"resume_concurrency": one("5"),
		"resume_on":          {valid: "1001", least: 1, most: many},
		"resume_limit":       one("5"),
		"replay":             one("off"),
		"replay_buffer":      one("1MiB"),
		"replay_overflow":    one("close"),
		"drain_window":       one("1s"),

		"ping_interval":      one("1s"),
		"ping_timeout":       one("1s"),
		"idle_timeout":       one("1s"),
		"first_data_timeout": one("1s"),
		"max_lifetime":       one("1s"),
		"write_timeout":      one("1s"),

		"max_connections":         one("5"),
		"max_connections_per_ip":  one("5"),
		"client_max_message_size": one("1MiB"),
		"server_max_message_size": one("1MiB"),
		"allowed_origins":         {valid: "example.com", least: 1, most: many},
		"compression":             one("off"),

		"header_up":      {valid: "A b c", least: 1, most: 3, repeatable: true},
		"header_down":    {valid: "A b c", least: 1, most: 3, repeatable: true},
		"default_origin": one("https://example.com"),
	},
	"sni_passthrough": {
		"name":                     one("chat"),
		"to":                       {valid: "other:8080", least: 1, most: many},
		"upstream_max_connections": one("5"),

		"lb_policy":       {valid: "first", least: 1, most: many, block: true},
		"lb_retries":      one("5"),
		"lb_try_duration": one("5s"),
		"lb_try_interval": one("1s"),

		"dial_timeout":   one("1s"),
		"proxy_protocol": one("v2"),

		"health_interval":    one("1s"),
		"health_timeout":     one("1s"),
		"health_fails":       one("5"),
		"health_passes":      one("5"),
		"health_port":        one("443"),
		"health_tcp":         {},
		"health_tls":         {valid: "app", most: 1},
		"fail_duration":      one("1s"),
		"max_fails":          one("5"),
		"close_if_unhealthy": {},

		"keep_alive_treatment":  one("standard"),
		"inactivity_timeout":    one("1s"),
		"inactivity_multiplier": one("2"),
		"inactivity_grace":      one("1s"),
		"max_lifetime":          one("1s"),
		"half_open_timeout":     one("1s"),
		"stuck_timeout":         one("1s"),
		"tcp_keepalive":         {valid: "1s 1s 1", least: 1, most: 3},
		"tcp_user_timeout":      one("1s"),

		"max_connections":        one("5"),
		"max_connections_per_ip": one("5"),
		"log":                    {},
	},
}

// What only makes sense for WebSockets is refused on a passthrough, and the error says why.
func TestWebSocketSettingsOnPassthrough(t *testing.T) {
	for name, s := range subdirectives["websocket_proxy"] {
		if _, both := subdirectives["sni_passthrough"][name]; !both {
			wantError(t, load(t, fmt.Sprintf(blocks["sni_passthrough"], name+" "+s.valid)), name+": ", "sees no HTTP and no WebSocket frames")
		}
	}
}

// What is missing, empty, too much or there twice is refused for every
// subdirective.
func TestArguments(t *testing.T) {
	for directive, all := range subdirectives {
		for name, s := range all {
			t.Run(directive+"/"+name, func(t *testing.T) {
				valid := strings.TrimRight(name+" "+s.valid, " ")
				refused := func(text string, wants ...string) {
					t.Helper()
					wantError(t, load(t, fmt.Sprintf(blocks[directive], text)), wants...)
				}
				if s.least > 0 {
					refused(name, name+": missing argument")
				}
				if s.most > 0 {
					refused(name+` ""`, name, `""`)
				}
				if s.most < many {
					refused(valid+" surplus", name+": ", `: surplus argument "surplus"`)
				}
				if !s.block {
					refused(valid+" {\nsurplus\n}", name+": surplus block")
				}
				if !s.repeatable {
					refused(valid+"\n"+valid, name+": repeated")
				}
			})
		}
	}
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

// load adapts and provisions a Caddyfile.
func load(t *testing.T, input string) error {
	t.Helper()
	config, err := adapt(input)
	if err != nil {
		return err
	}
	return provision(t, config)
}

func wantError(t *testing.T, err error, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error: got %v, want one with %q", err, want)
		}
	}
}

// certificates returns a folder with the files that fixtures name: client.crt,
// which is its own authority, and client.key.
func certificates(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, block := range map[string]*pem.Block{
		"client.crt": {Type: "CERTIFICATE", Bytes: cert}, "client.key": {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func fixtures(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/adapt/" + pattern + ".caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("no fixtures %s: %v", pattern, err)
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
