// This file tests what addresses of upstreams may look like, and what they mean.

package pool

import (
	"strings"
	"testing"
)

func TestAddressesThatAreGood(t *testing.T) {
	tests := map[string]struct {
		name          string
		network, dial string
		secure, plain bool
	}{
		"host and port":                 {"app:8080", "tcp", "app:8080", false, false},
		"the default port is 80":        {"app", "tcp", "app:80", false, false},
		"ws is without TLS":             {"ws://app:8080", "tcp", "app:8080", false, true},
		"http is without TLS":           {"http://app:8080", "tcp", "app:8080", false, true},
		"wss is with TLS":               {"wss://app:8443", "tcp", "app:8443", true, false},
		"https is with TLS":             {"https://app:8443", "tcp", "app:8443", true, false},
		"ws has port 80":                {"ws://app", "tcp", "app:80", false, true},
		"http has port 80":              {"http://app", "tcp", "app:80", false, true},
		"wss has port 443":              {"wss://app", "tcp", "app:443", true, false},
		"https has port 443":            {"https://app", "tcp", "app:443", true, false},
		"a port of this machine":        {":8080", "tcp", "localhost:8080", false, false},
		"IPv4":                          {"192.0.2.1:80", "tcp", "192.0.2.1:80", false, false},
		"IPv6":                          {"[2001:db8::1]:8080", "tcp", "[2001:db8::1]:8080", false, false},
		"IPv6 without a port":           {"[2001:db8::1]", "tcp", "[2001:db8::1]:80", false, false},
		"IPv6 in a URL":                 {"wss://[2001:db8::1]", "tcp", "[2001:db8::1]:443", true, false},
		"IPv6 with a zone":              {"[fe80::1%eth0]:80", "tcp", "[fe80::1%eth0]:80", false, false},
		"a network":                     {"tcp/app:8080", "tcp", "app:8080", false, false},
		"IPv4 only":                     {"tcp4/app:8080", "tcp4", "app:8080", false, false},
		"IPv6 only":                     {"tcp6/app:8080", "tcp6", "app:8080", false, false},
		"a socket with a path":          {"unix//run/app.sock", "unix", "/run/app.sock", false, false},
		"a socket with a relative path": {"unix/app.sock", "unix", "app.sock", false, false},
		"an abstract socket":            {"unix/@app", "unix", "@app", false, false},
		"a port with zeros":             {"app:0080", "tcp", "app:80", false, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			a, err := ParseAddress(test.name)
			if err != nil {
				t.Fatal(err)
			}
			if a.Name != test.name {
				t.Errorf("got name %q, want %q", a.Name, test.name)
			}
			if a.Network() != test.network || a.Dial() != test.dial {
				t.Errorf("got %s %s, want %s %s", a.Network(), a.Dial(), test.network, test.dial)
			}
			if a.Secure != test.secure || a.Plain != test.plain {
				t.Errorf("got secure %t and plain %t, want %t and %t", a.Secure, a.Plain, test.secure, test.plain)
			}
			if a.Varies() {
				t.Error("got an address that varies, want a fixed one")
			}
			if e, err := a.Expand(nil); err != nil || e != a {
				t.Errorf("got %v and error %v from Expand, want the address itself", e, err)
			}
		})
	}
}

func TestAddressesThatAreBad(t *testing.T) {
	tests := map[string]struct{ name, want string }{
		"nothing":                      {"", "want an address"},
		"a space":                      {"app :80", "want an address"},
		"a line end":                   {"app:80\n", "want an address"},
		"another scheme":               {"ftp://app", `unsupported scheme "ftp": want ws, wss, http or https`},
		"h2c":                          {"h2c://app:80", `unsupported scheme "h2c"`},
		"no scheme":                    {"://app", `unsupported scheme ""`},
		"a colon":                      {":", "no host"},
		"no host behind a network":     {"tcp/:80", "no host"},
		"no host in a URL":             {"ws://:80", "no host"},
		"nothing in a URL":             {"ws://", "no host"},
		"a path":                       {"ws://app:80/chat", "only scheme, host and port"},
		"a slash":                      {"ws://app:80/", "only scheme, host and port"},
		"a query":                      {"ws://app:80?a=b", "only scheme, host and port"},
		"a fragment":                   {"ws://app:80#a", "only scheme, host and port"},
		"a user":                       {"ws://me:secret@app:80", "only scheme, host and port"},
		"a path of a placeholder":      {"ws://app/{path}", "only scheme, host and port"},
		"a user with a placeholder":    {"ws://me@{host}", "only scheme, host and port"},
		"a brace that is not closed":   {"{host:80", "a brace without its other one"},
		"a brace that is not opened":   {"host}:80", "a brace without its other one"},
		"braces with nothing in them":  {"{}:80", "a brace without its other one"},
		"a path without a scheme":      {"app:80/chat", `unsupported network "app:80"`},
		"a range of ports":             {"app:80-81", "want one port"},
		"port 0":                       {"app:0", "port 0"},
		"a port that is too large":     {"app:65536", "port"},
		"a port that is no number":     {"app:http", "port"},
		"a port in a URL":              {"ws://app:http", "port"},
		"IPv6 that is not closed":      {"ws://[::1:80", "missing"},
		"UDP":                          {"udp/app:80", `unsupported network "udp": want tcp or unix`},
		"a descriptor":                 {"fd/3", `unsupported network "fd"`},
		"datagrams":                    {"unixgram//run/app.sock", `unsupported network "unixgram"`},
		"HTTP/2 over a socket":         {"unix+h2c//run/app.sock", `unsupported network "unix+h2c"`},
		"a socket without a path":      {"unix/", "no path"},
		"a socket with a wrong scheme": {"ws://unix//run/app.sock", "only scheme, host and port"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			a, err := ParseAddress(test.name)
			if err == nil {
				t.Fatalf("got address %s %s, want an error", a.Network(), a.Dial())
			}
			if !strings.Contains(err.Error(), test.want) || !strings.HasPrefix(err.Error(), `upstream "`) {
				t.Errorf("got error %q, want one of an upstream with %q", err, test.want)
			}
		})
	}
}

func TestPlaceholdersInAddresses(t *testing.T) {
	values := strings.NewReplacer("{host}", "app", "{port}", "8080", "{v6}", "[2001:db8::1]", "{path}", "/run/app.sock", "{bad}", "a/b", "{none}", "")
	tests := map[string]struct {
		name, dial string
		secure     bool
		want       string // of the error
	}{
		"a host":                     {name: "{host}:80", dial: "app:80"},
		"a port":                     {name: "app:{port}", dial: "app:8080"},
		"both":                       {name: "{host}:{port}", dial: "app:8080"},
		"a part of a host":           {name: "{host}.internal:80", dial: "app.internal:80"},
		"IPv6":                       {name: "{v6}:80", dial: "[2001:db8::1]:80"},
		"the default port":           {name: "{host}", dial: "app:80"},
		"the default port of wss":    {name: "wss://{host}", dial: "app:443", secure: true},
		"a socket":                   {name: "unix/{path}", dial: "/run/app.sock"},
		"values that are empty":      {name: "{none}{none}:80", want: "no host"},
		"a value that is empty":      {name: "{none}:80", want: "no host"},
		"a port that is empty":       {name: "app:{none}", dial: "app:80"},
		"a value that is no host":    {name: "{bad}:80", want: `unsupported network "a"`},
		"a value that is not a port": {name: "app:{host}", want: "port"},
		"nobody knows what that is":  {name: "app:{what}", want: "port"},
		"a socket without a path":    {name: "unix/{none}", want: "no path"},
		"a scheme by a placeholder":  {name: "{host}://app:80", want: "unsupported network"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			a, err := ParseAddress(test.name)
			if err != nil {
				t.Fatal(err)
			}
			if !a.Varies() || a.Dial() != "" {
				t.Errorf("got %q before placeholders are replaced, want nothing yet", a.Dial())
			}
			e, err := a.Expand(values.Replace)
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), test.name) {
					t.Errorf("got error %v, want one of %q with %q", err, test.name, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if e.Dial() != test.dial || e.Secure != test.secure || e.Varies() {
				t.Errorf("got %q, secure %t, varies %t; want %q, %t, false", e.Dial(), e.Secure, e.Varies(), test.dial, test.secure)
			}
			if e.Name != test.name {
				t.Errorf("got name %q, want it as configured", e.Name)
			}
		})
	}
}

func TestAnotherPort(t *testing.T) {
	tests := map[string]struct{ name, port, want string }{
		"another":            {"app:80", "81", "app:81"},
		"none":               {"app:80", "", "app:80"},
		"IPv6":               {"[::1]:80", "81", "[::1]:81"},
		"a socket has none":  {"unix//run/app.sock", "81", "/run/app.sock"},
		"the scheme's is no": {"wss://app", "81", "app:81"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			a, err := ParseAddress(test.name)
			if err != nil {
				t.Fatal(err)
			}
			before := a
			other := a.WithPort(test.port)
			if other.Dial() != test.want || other.host != a.host {
				t.Errorf("got %q with host %q, want %q", other.Dial(), other.host, test.want)
			}
			if a != before {
				t.Errorf("got the address itself changed: %v", a)
			}
		})
	}
}

// What is accepted can be dialed, and means the same when it is read again.
func FuzzParseAddress(f *testing.F) {
	for _, seed := range []string{
		"app:80", "wss://[::1]", "unix//run/app.sock", "tcp6/[fe80::1%eth0]:1", "{host}:80", "ws://{host}", "https://me@app?a#b", "app:1-2", "[]", "unix/",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		a, err := ParseAddress(name)
		if err != nil {
			return
		}
		if a.Name != name || name == "" || strings.ContainsAny(name, " \t\r\n") || a.Secure && a.Plain {
			t.Fatalf("got %+v", a)
		}
		if a.Varies() {
			if a, err = a.Expand(strings.NewReplacer("{", "", "}", "").Replace); err != nil {
				return
			}
		}
		switch a.Network() {
		case "unix":
			if a.Port() != "" || a.Dial() == "" || a.Dial() != a.host {
				t.Fatalf("got %+v", a)
			}
		case "tcp", "tcp4", "tcp6":
			if a.host == "" || a.Port() == "" || a.Port() == "0" {
				t.Fatalf("got %+v", a)
			}
		default:
			t.Fatalf("got network %q", a.Network())
		}
		again, err := ParseAddress(a.Network() + "/" + a.Dial())
		if strings.ContainsAny(a.Dial(), " \t\r\n{") || strings.Contains(a.Dial(), "://") {
			return // of placeholders: it cannot be written down
		}
		if err != nil || again.Network() != a.Network() || again.Dial() != a.Dial() {
			t.Fatalf("got %q and error %v when it is read again, want %q", again.Dial(), err, a.Dial())
		}
	})
}

// An upstream that gets bytes as they come has a host and a port, or a path, and no
// scheme that would say what the bytes are.
func TestPlainAddresses(t *testing.T) {
	for name, want := range map[string]string{
		"app:443":                    "tcp app:443",
		"tcp4/10.0.0.1:443":          "tcp4 10.0.0.1:443",
		"[2001:db8::1]:443":          "tcp [2001:db8::1]:443",
		"unix//run/app.sock":         "unix /run/app.sock",
		"{l4.tls.server_name}:443":   "tcp some.test:443",
		"{l4.tls.server_name}":       `upstream "{l4.tls.server_name}": address "some.test": want host:port`,
		"tcp/{l4.tls.server_name}:1": "tcp some.test:1",
		"app":                        `upstream "app": want host:port`,
		"https://app:443":            `upstream "https://app:443": want host:port: bytes are passed as they come, and a URL has no say in that`,
		"":                           `upstream "": want an address`,
	} {
		a, err := ParsePlainAddress(name)
		if err == nil {
			a, err = a.Expand(func(s string) string { return strings.ReplaceAll(s, "{l4.tls.server_name}", "some.test") })
		}
		got := a.Network() + " " + a.Dial()
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
		}
	}
}
